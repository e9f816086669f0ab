#pragma once

#include "diffattn/layers/circle.hpp"
