// error: deleted
#include "diffattn/kernels/mask.hpp"

diffattn::Matrix<float> table();

#ifdef MISUSE
auto mask() { return diffattn::with_bias(diffattn::CausalMask{}, diffattn::RelativeBias(table())); }
#endif

diffattn::Index column(diffattn::Index, diffattn::Index, diffattn::Index, diffattn::Index);

// These have memory of their own.
void good(const diffattn::Matrix<float>& m) {
  diffattn::RelativeBias<float>{m.topRows(2)};
  diffattn::IndexedBias(m, column);
}
