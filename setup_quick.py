"""Builds the shared libraries of entropy_rl_ext; everything else is in pyproject.toml.

Three libraries, so that one wheel serves CPU and CUDA installations of PyTorch:
  entropy_rl_ext/_cpu       schemas and CPU kernels      stable ABI, limited API
  entropy_rl_ext/_cuda      CUDA kernels                 stable ABI, limited API
  entropy_rl_ext/_bindings  pybind11, build information  not in an abi3 wheel

CUDA is built wherever the building torch is a CUDA build and a toolkit is found; a GPU is not needed.
ENTROPY_RL_CUDA=0 leaves it out. ENTROPY_RL_ABI3=1 makes the wheel that serves Python 3.10 and later; with CUDA
kernels its version ends in their CUDA version, 0.1.0+cu130, by which pip tells it from the CPU wheel.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from setuptools import Extension, setup

ABI3 = os.environ.get("ENTROPY_RL_ABI3") == "1"

with open(os.path.join(os.path.dirname(__file__), "pyproject.toml")) as project:
    PROJECT = project.read()
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE)[1]


def check_requirements():
    """Exits with one line where this environment lacks a build requirement of pyproject.toml."""
    requirements = re.findall(r'"(.+?)"', re.search(r"^requires = \[(.+)\]$", PROJECT, re.MULTILINE)[1])
    missing = []
    for requirement in requirements:
        name, _, oldest = requirement.partition(">=")
        try:
            met = numbers(version(name)) >= numbers(oldest)
        except PackageNotFoundError:
            met = (name == "ninja" and shutil.which("ninja")) or (name == "pybind11" and ABI3)
        if not met:
            missing.append(shlex.quote(requirement))
    if missing:
        sys.exit(f"entropy_rl_ext: {sys.prefix} lacks what the build needs; run pip install {' '.join(missing)}")


def numbers(text):
    return [int(digits) for digits in re.findall(r"\d+", text)[:2]]


check_requirements()
# torch looks for ninja on the PATH, which lacks an environment that is not activated.
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")

import torch  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

# Machine code of 10.0 and 12.0 needs nvcc 12.8; without it, the driver compiles the PTX of 9.0 on such a GPU.
CUDA_ARCHS = ("8.0", "9.0+PTX", "10.0", "12.0")


def find_cuda_toolkit():
    """The toolkit's directory, or None: nvcc on the PATH may be a launcher that lies elsewhere."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME]
    for path in [*candidates, "/usr/local/cuda"]:
        if path and os.path.isfile(f"{path}/bin/nvcc") and os.path.isfile(f"{path}/include/cuda_runtime.h"):
            return path
    return None


def decide_cuda():
    """(build the CUDA kernels?, toolkit, the reason in words)"""
    if os.environ.get("ENTROPY_RL_CUDA") == "0":
        return False, None, "ENTROPY_RL_CUDA is 0"
    if torch.version.cuda is None:
        return False, None, f"torch {torch.__version__} is not a CUDA build"
    toolkit = find_cuda_toolkit()
    if toolkit is None:
        return False, None, "no CUDA toolkit (nvcc and cuda_runtime.h) was found; set CUDA_HOME to one"
    return (
        True,
        toolkit,
        f"torch {torch.__version__} is a CUDA {torch.version.cuda} build, toolkit in {toolkit}",
    )


def cuda_archs(toolkit):
    """Those of CUDA_ARCHS that this toolkit compiles for, as TORCH_CUDA_ARCH_LIST has them."""
    known = subprocess.run([f"{toolkit}/bin/nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = known.stdout.split()
    return ";".join(arch for arch in CUDA_ARCHS if "sm_" + arch.partition("+")[0].replace(".", "") in known)


BUILD_CUDA, TOOLKIT, REASON = decide_cuda()
if BUILD_CUDA:
    cpp_extension.CUDA_HOME = TOOLKIT
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", cuda_archs(TOOLKIT))
print(f"entropy_rl_ext: building {'CPU and CUDA' if BUILD_CUDA else 'CPU only'}: {REASON}", file=sys.stderr)


def macro(text):
    return f'"{text}"'


BUILD_INFO = [
    ("ENTROPY_RL_VERSION", macro(VERSION)),
    ("ENTROPY_RL_TORCH_VERSION", macro(torch.__version__)),
    ("ENTROPY_RL_CUDA_VERSION", macro(torch.version.cuda if BUILD_CUDA else "")),
    ("ENTROPY_RL_CUDA_ARCHS", macro(os.environ["TORCH_CUDA_ARCH_LIST"] if BUILD_CUDA else "")),
]
# The oldest torch that the libraries load under: 2.11.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
HEADERS = glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True)


def op_library(make, name, sources, flags):
    return make(
        f"entropy_rl_ext.{name}",
        sorted(sources),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=BUILD_INFO,
        extra_compile_args=flags,
        py_limited_api=True,
        depends=HEADERS,
    )


extensions = [
    op_library(
        cpp_extension.CppExtension,
        "_cpu",
        ["csrc/library.cpp", *glob.glob("csrc/cpu/*.cpp")],
        {"cxx": CXX_FLAGS + STABLE_ABI},
    )
]
if BUILD_CUDA:
    extensions.append(
        op_library(
            cpp_extension.CUDAExtension,
            "_cuda",
            glob.glob("csrc/cuda/*.cu"),
            {
                "cxx": CXX_FLAGS + STABLE_ABI,
                "nvcc": ["-std=c++17", "-O3", "-lineinfo", "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden", *STABLE_ABI],
            },
        )
    )
if not ABI3:
    import pybind11

    extensions.append(
        Extension(
            "entropy_rl_ext._bindings",
            ["csrc/bindings.cpp"],
            include_dirs=[pybind11.get_include(), "csrc"],
            define_macros=BUILD_INFO,
            extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden"],
            language="c++",
        )
    )


extensions = extensions[1:]


class Build(cpp_extension.BuildExtension):
    """Checks the compiler, reports progress, and keeps the objects of an in-place build for the next one."""

    def finalize_options(self):
        super().finalize_options()
        if self.inplace:
            self.build_temp = os.path.join("build", "inplace")

    def build_extensions(self):
        check_compiler()
        files = [file for extension in self.extensions for file in extension.sources]
        duration = "minutes" if any(file.endswith(".cu") for file in files) else "about a minute"
        jobs = os.environ.get("MAX_JOBS") or os.cpu_count()
        print(f"entropy_rl_ext: compiling {len(files)} files, {jobs} at a time (MAX_JOBS): {duration}", flush=True)
        os.environ.setdefault("NINJA_STATUS", "[%f of %t done, %e s] ")
        os.environ.setdefault("MAX_JOBS", str(jobs))
        if not self.debug:  # Python's own flags have -g, which makes the library five times as large
            for extension in self.extensions:
                flags = extension.extra_compile_args
                (flags["cxx"] if isinstance(flags, dict) else flags).append("-g0")
                extension.extra_link_args.append("-Wl,-s")
        super().build_extensions()

    def build_extension(self, extension):
        """Gives each library its own folder of objects: each has its own build.ninja."""
        parent = self.build_temp
        self.build_temp = os.path.join(parent, extension.name.rpartition(".")[2])
        super().build_extension(extension)
        self.build_temp = parent


def check_compiler():
    """Exits with one line where there is no C++17 compiler."""
    compiler = os.environ.get("CXX", "c++")
    command = [*shlex.split(compiler), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    program = "#include <charconv>\n#include <optional>\nstd::optional<int> value;\n"
    try:
        result = subprocess.run(command, input=program, capture_output=True, text=True)
    except OSError:
        sys.exit(f"entropy_rl_ext: no C++ compiler: {compiler!r} does not run; install g++, or set CXX to a compiler")
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[0]
        sys.exit(f"entropy_rl_ext: {compiler!r} does not compile C++17 ({reason}); install a newer g++, or set CXX")


OPTIONS = {}
if ABI3:
    OPTIONS["bdist_wheel"] = {"py_limited_api": "cp310"}
    if BUILD_CUDA:
        OPTIONS["egg_info"] = {"tag_build": "+cu" + torch.version.cuda.replace(".", "")}


def description():
    """The README, and the addresses of the project, for the page of a package index.

    The repository's address is in ENTROPY_RL_REPOSITORY, or in what GitHub sets in a workflow. With it the README's
    links lead to the repository's files of this version, because an index has the README alone. Without it they stay.
    """
    with open(os.path.join(os.path.dirname(__file__), "README.md"), encoding="utf-8") as file:
        readme = file.read()
    server, name = (os.environ.get(f"GITHUB_{part}") for part in ("SERVER_URL", "REPOSITORY"))
    address = os.environ.get("ENTROPY_RL_REPOSITORY") or (f"{server}/{name}" if server and name else None)
    if not address:
        return readme, {}

    def absolute(link):
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({address}/{kind}/v{VERSION}/{link[3]})"

    readme = re.sub(r"(!?)\[([^][]+)\]\((?!https?://|#)([^)]+)\)", absolute, readme)
    urls = {
        "Homepage": "",
        "Documentation": "/tree/v{}/docs",
        "Changelog": "/blob/v{}/CHANGELOG.md",
        "Issues": "/issues",
    }
    return readme, {name: address + path.format(VERSION) for name, path in urls.items()}


README, URLS = description()

setup(
    long_description=README,
    long_description_content_type="text/markdown",
    project_urls=URLS,
    packages=[
        "entropy_rl_ext",
        "entropy_rl_ext.ops",
        "entropy_rl",
        "entropy_rl.config",
        "entropy_rl.integrations",
        "entropy_rl.integrations.verl",
        "entropy_rl.report",
        "hydra_plugins",
    ],
    package_dir={"entropy_rl": "python/entropy_rl", "hydra_plugins": "python/hydra_plugins"},
    package_data={
        "entropy_rl_ext": ["py.typed"],
        "entropy_rl.config": ["train.yaml"],
        "entropy_rl.integrations.verl": ["conf/*/*.yaml"],
        "entropy_rl.report": ["page.html", "page.css", "page.js"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options=OPTIONS,
)
