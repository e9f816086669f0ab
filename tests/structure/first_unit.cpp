// A function that forgot to be inline is defined in both units, and the program does not link.

#include "all_headers.hpp"

diffattn::Matrix<float> second_unit(const diffattn::Matrix<float>& x);

int main() {
  const diffattn::Matrix<float> x = diffattn::Matrix<float>::Ones(3, 4);
  const diffattn::Matrix<float> y = diffattn::diff_attention(x, x, x, x, x, 0.5);
  return y == second_unit(x) ? 0 : 1;
}
