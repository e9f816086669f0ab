// The main of every test executable: says which versions were tested and with which seed.

#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_RUNNER
#endif
#include "support/catch.hpp"

#include <Eigen/Core>

#include <iostream>

#include "diffattn/core/version.hpp"

int main(int argc, char** argv) {
  Catch::Session session;
  session.configData().rngSeed = 1;  // the same numbers on every run; --rng-seed tries others
  if (const int error = session.applyCommandLine(argc, argv); error != 0) return error;

  std::cerr << "diffattn " << diffattn::kVersionMajor << '.' << diffattn::kVersionMinor << '.'
            << diffattn::kVersionPatch << ", Eigen " << EIGEN_WORLD_VERSION << '.' << EIGEN_MAJOR_VERSION << '.'
            << EIGEN_MINOR_VERSION << " (" << Eigen::SimdInstructionSetsInUse() << "), Catch2 " << CATCH_VERSION_MAJOR
            << '.' << CATCH_VERSION_MINOR << '.' << CATCH_VERSION_PATCH << ", compiler " << __VERSION__
            << ", --rng-seed " << session.configData().rngSeed << '\n';
  return session.run();
}
