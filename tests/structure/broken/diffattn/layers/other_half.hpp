#pragma once

#include "diffattn/layers/circle.hpp"

inline int too_long() {
  int sum = 0;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  sum += 1;
  return sum;
}
