// error: diffattn: the kernels take float or double

#include <diffattn/kernels/attention.hpp>

#ifdef MISUSE
using Scalar = int;
#else
using Scalar = float;
#endif

auto attend(const diffattn::Matrix<Scalar>& x) { return diffattn::attention(x, x, x); }
