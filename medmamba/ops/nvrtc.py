"""Compiles CUDA C++ on first use with NVRTC, which is part of every CUDA build of torch, so no nvcc is needed.

The cache key contains source, settings, chip and compiler version. NVRTC and the driver are called through ctypes:
their C interfaces are stable, and torch's wrappers around them are not public.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medmamba.ops.build_cache import BuildError, kept

_MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_WITHOUT_ASKING = 48 << 10


class Kernels:
    """The kernels of a built source. `kernels(name, grid, threads, shared_bytes, arguments)` launches one."""

    def __init__(self, image: bytes) -> None:
        self._image = image  # keep a reference: the driver reads it lazily
        library = ctypes.c_void_p()
        load = _driver().cuLibraryLoadData
        _checked(load(ctypes.byref(library), image, None, None, 0, None, None, 0), "cuLibraryLoadData")
        self._library = library
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self._allowed: dict[tuple[str, int], int] = {}

    def __call__(
        self, name: str, grid: tuple[int, int], threads: int, shared_bytes: int, arguments: Sequence[Any]
    ) -> None:
        """Launches on torch's current device and stream. Arguments: tensors, None (null pointer) or ctypes values."""
        kernel = self._kernels.get(name) or self._find(name)
        device = torch.cuda.current_device()
        _enter(device)
        if shared_bytes > self._allowed.get((name, device), _SHARED_WITHOUT_ASKING):
            allow = _driver().cuKernelSetAttribute
            _checked(allow(_MAX_SHARED, shared_bytes, kernel, device), "cuKernelSetAttribute")
            self._allowed[name, device] = shared_bytes
        values = [
            ctypes.c_void_p(None if a is None else a.data_ptr()) if a is None or isinstance(a, torch.Tensor) else a
            for a in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        launch = _driver().cuLaunchKernel
        _checked(launch(kernel, *grid, 1, threads, 1, 1, shared_bytes, stream, pointers, None), f"launch of {name}")

    def _find(self, name: str) -> ctypes.c_void_p:
        kernel = ctypes.c_void_p()
        _checked(
            _driver().cuLibraryGetKernel(ctypes.byref(kernel), self._library, name.encode()),
            f"cuLibraryGetKernel {name}",
        )
        self._kernels[name] = kernel
        return kernel


def build(source: Path, settings: Mapping[str, int], device: torch.device) -> Kernels:
    """The kernels of a CUDA source for the chip of `device`, with each setting as a macro. Raises BuildError."""
    major, minor = torch.cuda.get_device_capability(device)
    return _build(source, tuple(sorted(settings.items())), f"sm_{major}{minor}")


@functools.cache
def unusable() -> str | None:
    """Why nothing can be built here; None if it can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip:
        return "it requires an NVIDIA GPU"
    try:
        _driver().cuLibraryLoadData  # noqa: B018  (drivers before CUDA 12 lack it)
        _nvrtc()
    except (OSError, AttributeError, BuildError) as error:
        return str(error)
    return None


@functools.cache
def _build(source: Path, settings: tuple[tuple[str, int], ...], chip: str) -> Kernels:
    options = (f"--gpu-architecture={chip}", "--std=c++17", *(f"-D{name}={value}" for name, value in settings))
    cubin = kept(source, "cubin", (options, _version()), lambda code: _compiled(source.name, code, options))
    return Kernels(cubin.read_bytes())


def _compiled(name: str, code: bytes, options: Sequence[str]) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    _checked_nvrtc(nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, name.encode(), 0, None, None))
    flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), flags)
    size = ctypes.c_size_t()
    if failed:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        raise BuildError(f"{name} does not compile with {' '.join(options)}:\n{text.value.decode(errors='replace')}")
    _checked_nvrtc(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
    image = ctypes.create_string_buffer(size.value)
    _checked_nvrtc(nvrtc.nvrtcGetCUBIN(program, image))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw


@functools.cache
def _nvrtc() -> Any:
    """NVRTC of torch's CUDA version, because its builtins must match."""
    major = (torch.version.cuda or "").partition(".")[0]
    places = [Path(entry) / "nvidia" for entry in sys.path if (Path(entry) / "nvidia").is_dir()]
    found = [path for place in places for path in place.glob(f"*/lib/libnvrtc.so.{major}*")]
    torch_lib = Path(torch.__file__).parent / "lib"
    found += [*torch_lib.glob(f"libnvrtc.so.{major}*"), *torch_lib.glob("libnvrtc-*.so*")]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    names = [*map(str, found), f"libnvrtc.so.{major}", f"{home}/lib64/libnvrtc.so.{major}"]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError(f"libnvrtc.so.{major} not found: install nvidia-cuda-nvrtc for CUDA {torch.version.cuda} with pip")


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _enter(device: int) -> None:
    """Makes torch's context of the device current; a new thread, such as autograd's, has none yet."""
    current = ctypes.c_void_p()
    _checked(_driver().cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if not current.value:
        _checked(_driver().cuCtxSetCurrent(_context(device)), "cuCtxSetCurrent")


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _checked(_driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    _checked(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    return context


@functools.cache
def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _checked_nvrtc(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _checked(status: int, doing: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise BuildError(f"{doing}: CUDA error {status} ({(text.value or b'unknown').decode()})")


def _checked_nvrtc(status: int) -> None:
    if status:
        raise BuildError(f"NVRTC error {status}")
