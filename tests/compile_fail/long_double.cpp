// error: diffattn: the kernels take float or double (diffattn::reference takes long double too)

#include <diffattn/kernels/diff_attention.hpp>
#include <diffattn/kernels/reference.hpp>

using Wide = diffattn::Matrix<long double>;

#ifdef MISUSE
auto attend(const Wide& x) { return diffattn::diff_attention(x, x, x, x, x, 0.5); }
#else
auto attend(const Wide& x) { return diffattn::reference::diff_attention(x, x, x, x, x, 0.5); }
#endif
