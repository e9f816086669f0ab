"""Conan 2: `conan create cmake/packaging/conan` in a checkout puts diffattn into the local cache."""

import os
import re

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeToolchain
from conan.tools.files import copy, load, rmdir


class Diffattn(ConanFile):
    name = "diffattn"
    description = "Differential attention for C++20 on Eigen"
    license = "MIT"
    topics = ("attention", "transformer", "eigen", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"io": [True, False]}
    default_options = {"io": True}
    no_copy_source = True
    generators = "CMakeDeps"

    def _checkout(self):
        return os.path.join(self.recipe_folder, "..", "..", "..")

    def set_version(self):
        header = load(self, os.path.join(self._checkout(), "include", "diffattn", "core", "version.hpp"))
        self.version = ".".join(re.findall(r"#define DIFFATTN_VERSION_\w+ (\d+)", header))

    def export_sources(self):
        for pattern in ("CMakeLists.txt", "LICENSE", "cmake/*", "include/*"):
            copy(self, pattern, self._checkout(), self.export_sources_folder)

    def requirements(self):
        self.requires("eigen/[>=3.4.0]", transitive_headers=True)
        if self.options.io:
            self.requires("nlohmann_json/[>=3.9.1]", transitive_headers=True)

    def validate(self):
        check_min_cppstd(self, 20)

    def package_id(self):
        # Headers are the same for every compiler; the option says which of them there are.
        self.info.settings.clear()

    def generate(self):
        toolchain = CMakeToolchain(self)
        for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_BENCH", "MPI"):
            toolchain.cache_variables[f"DIFFATTN_{part}"] = False
        toolchain.cache_variables["DIFFATTN_IO"] = bool(self.options.io)
        toolchain.cache_variables["CMAKE_DISABLE_FIND_PACKAGE_nlohmann_json"] = not self.options.io
        toolchain.cache_variables["FETCHCONTENT_FULLY_DISCONNECTED"] = True
        toolchain.generate()

    def package(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.install()
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        rmdir(self, os.path.join(self.package_folder, "share"))  # CMakeDeps and PkgConfigDeps write their own

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.components["core"].set_property("cmake_target_name", "diffattn::diffattn")
        self.cpp_info.components["core"].set_property("pkg_config_name", "diffattn")
        self.cpp_info.components["core"].requires = ["eigen::eigen"]
        if self.options.io:
            self.cpp_info.components["io"].set_property("cmake_target_name", "diffattn::io")
            self.cpp_info.components["io"].set_property("pkg_config_name", "diffattn-io")
            self.cpp_info.components["io"].requires = ["core", "nlohmann_json::nlohmann_json"]
