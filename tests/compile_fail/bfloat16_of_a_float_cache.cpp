// error: diffattn: q is of bfloat16 and the cache is not; it must be a KvCache<Eigen::bfloat16>

#include <diffattn/kernels/decode.hpp>

#ifdef MISUSE
using Storage = float;
#else
using Storage = Eigen::bfloat16;
#endif

auto attend(const diffattn::Matrix<Eigen::bfloat16>& q, const diffattn::KeyValuePages<Storage>& pages) {
  return diffattn::decode_attention(q, pages, diffattn::Heads{1, 1});
}
