#include <diffattn/io/safetensors.hpp>

#include <filesystem>

int main() {
  const auto path = std::filesystem::temp_directory_path() / "diffattn_consumer.safetensors";
  const diffattn::Matrix<float> x = diffattn::Matrix<float>::Random(3, 4);
  diffattn::SafetensorsWriter writer;
  writer.add("x", x);
  writer.save(path);
  return diffattn::Safetensors(path).matrix<float>("x") == x ? 0 : 1;
}
