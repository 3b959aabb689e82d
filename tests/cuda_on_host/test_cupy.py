"""The stand-in for CuPy does what CuPy does, as far as tests of onepass rely on it."""

import copy
import ctypes
import gc
import os
import pickle
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

if "ONEPASS_CUDA_ON_HOST" not in os.environ:
    pytest.skip("ONEPASS_CUDA_ON_HOST names no libcuda_on_host.so", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import cupy
from cupy import _dlpack
from cupy._host import library
from cupy.cuda.runtime import CUDARuntimeError


@pytest.fixture(autouse=True)
def fresh():
    library.onepass_host_reset()
    yield
    library.onepass_host_reset()
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    library.onepass_host_verify()


@pytest.fixture
def grid():
    return cupy.arange(12, dtype=np.float32).reshape(3, 4)


def test_an_array_is_no_numpy_array(grid):
    assert not isinstance(grid, np.ndarray)
    for convert in (np.asarray, lambda a: np.ones(4) * a, lambda a: np.add(np.ones(4), a), np.add.reduce):
        with pytest.raises(TypeError):
            convert(grid)
    with pytest.raises(ValueError, match="non-scalar"):
        grid[...] = np.ones((3, 4))
    with pytest.raises(AttributeError):
        _ = cupy.linalg
    with pytest.raises(AttributeError):
        _ = grid.ctypes
    with pytest.raises(TypeError, match="unhashable"):
        hash(grid)


def test_functions_of_numpys_name_make_arrays_of_this_module(grid):
    host = grid.get()
    for got, want in (
        (np.sqrt(grid), np.sqrt(host)),
        (np.maximum(grid, np.float32(5)), np.maximum(host, 5)),
        (cupy.exp(-grid), np.exp(-host)),
        (cupy.log(grid), np.log(np.maximum(host, 0), where=host > 0, out=np.full_like(host, -np.inf))),
        (cupy.where(grid > 3, grid, 0), np.where(host > 3, host, 0)),
        (grid @ grid.T, host @ host.T),
        (grid.max(axis=1, keepdims=True), host.max(axis=1, keepdims=True)),
        (grid.argmax(axis=1), host.argmax(axis=1)),
        (grid.take(cupy.asarray([2, 0]), axis=0), host.take([2, 0], axis=0)),
    ):
        assert isinstance(got, cupy.ndarray)
        np.testing.assert_array_equal(got.get(), want)


def test_views_share_memory_and_keep_it_alive(grid):
    pool = cupy.get_default_memory_pool()
    column = grid[1:, ::2]
    assert (column.shape, column.strides) == ((2, 2), (16, 8))
    assert column.data.ptr == grid.data.ptr + 16
    column[...] = 0
    assert_array_equal(grid.get()[1:, ::2], 0)
    assert grid[1, 2].shape == ()
    assert grid[::-1].strides == (-16, 4)
    assert grid.T.flags.f_contiguous
    assert not grid.T.flags.c_contiguous
    assert not grid[0].flags.owndata
    assert grid.copy().flags.owndata
    reference, used = weakref.ref(column), pool.used_bytes()
    row = grid[0]
    del grid, column
    assert reference() is None
    assert_array_equal(row.get(), [0, 1, 2, 3])
    gc.collect()
    assert pool.used_bytes() <= used


def test_layouts(grid):
    fortran = cupy.asarray(np.asfortranarray(np.ones((2, 3))))
    assert fortran.strides == (8, 16)
    assert cupy.empty_like(fortran).strides == (8, 16)
    assert (fortran.copy().strides, fortran.copy("K").strides) == ((24, 8), (8, 16))
    assert cupy.empty((0, 3)).flags.forc
    assert cupy.ndarray((2, 2), np.float32, grid.data, (4, 16))[1, 1].item() == 5
    assert_array_equal(grid.T.copy().get(), np.arange(12).reshape(3, 4).T)


def test_arithmetic(grid):
    host = grid.get()
    assert_array_equal((2 - grid * 3).get(), 2 - host * 3)
    assert bool((grid >= 0).all())
    assert float(grid.sum()) == host.sum()
    grid += grid
    assert_array_equal(grid.get(), 2 * host)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(grid)


def test_bfloat16():
    ones = cupy.ones(3, ml_dtypes.bfloat16)
    assert ones.dtype == ml_dtypes.bfloat16
    assert_array_equal(ones.view(np.uint16).get(), 0x3F80)
    assert ones.__cuda_array_interface__["typestr"] == "<V2"


def test_interfaces(grid):
    interface = grid.__cuda_array_interface__
    assert interface["stream"] == 1
    assert interface["strides"] is None
    assert interface["data"] == (grid.data.ptr, False)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        assert grid.__cuda_array_interface__["stream"] == stream.ptr == cupy.cuda.get_current_stream().ptr

    class Foreign:
        __cuda_array_interface__ = grid.T.__cuda_array_interface__

    other = cupy.asarray(Foreign())
    other[0, 1] = 77
    assert grid[1, 0].item() == 77
    assert grid.__dlpack_device__() == (2, 0)
    for version, name in ((None, "dltensor"), ((1, 0), "dltensor_versioned")):
        capsule = grid.__dlpack__(max_version=version, stream=stream.ptr)
        assert f'"{name}"' in repr(capsule)
        assert len(_dlpack._alive) == 1
        del capsule
        assert not _dlpack._alive
    with pytest.raises(ValueError, match="valid stream"):
        grid.__dlpack__(stream=0)


def test_copies(grid):
    for other in (pickle.loads(pickle.dumps(grid)), copy.deepcopy(grid), grid.astype(np.float32)):
        assert other.data.ptr != grid.data.ptr
        assert_array_equal(other.get(), grid.get())
    before = library.onepass_host_calls(b"cudaStreamSynchronize")
    grid.get()
    assert library.onepass_host_calls(b"cudaStreamSynchronize") == before + 1
    grid.set(np.zeros((3, 4), np.float32))
    assert_array_equal(grid.get(), 0)
    with pytest.raises(TypeError):
        grid.set(np.zeros((3, 4)))
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(16), np.float32)
    pinned[:] = 3
    assert_array_equal(cupy.asnumpy(cupy.asarray(pinned)), 3)


def test_out_of_memory():
    library.onepass_host_fail(b"cudaMalloc", 2, 2)
    cupy.empty(3)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match="allocating 24 bytes"):
        cupy.empty(3)
    cupy.empty(3)
    with pytest.raises(MemoryError):
        cupy.empty(1 << 40)


def test_devices():
    with cupy.cuda.Device(1):
        there = cupy.zeros(3, np.float32)
        assert there.device == cupy.cuda.Device() == cupy.cuda.Device(1)
    assert cupy.cuda.Device().id == 0
    assert_array_equal(there.get(), 0)
    assert there.copy().device.id == 0
    with pytest.raises(ValueError, match="current device"):
        there + 1
    with pytest.raises(CUDARuntimeError, match="cudaErrorInvalidDevice"):
        cupy.cuda.Device(2).use()
    assert cupy.cuda.Device(0).compute_capability == "90"
    library.onepass_host_set_devices(0)
    assert not cupy.cuda.is_available()


def test_streams_and_graphs():
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        values = cupy.ones(4, np.float32)
        stream.begin_capture()
        assert stream.is_capturing()
        values.fill(0)
        with pytest.raises(NotImplementedError):
            values + 1
        with pytest.raises(RuntimeError, match="capturing"):
            values.get()
        with pytest.raises(RuntimeError, match="capturing"):
            cupy.asarray(np.ones(3))
        graph = stream.end_capture()
        assert_array_equal(values.get(), 1)
        graph.launch()
        assert_array_equal(values.get(), 0)
    assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null
    with pytest.raises(RuntimeError, match="legacy"):
        cupy.cuda.Stream.null.begin_capture()
    gone = cupy.cuda.ExternalStream(stream.ptr)
    del stream, graph
    gc.collect()
    with gone, pytest.raises(CUDARuntimeError, match="cudaErrorInvalidResourceHandle") as error:
        values + 1
    assert error.value.status == 400


def test_memory_is_poisoned_before_and_after_its_life():
    values = cupy.empty(4, np.float32)
    assert np.isnan(values.get()).all()
    values.fill(1)
    memory = (ctypes.c_ubyte * 16).from_address(values.data.ptr)
    del values
    gc.collect()
    assert bytes(memory) == b"\xff" * 16
    memory[3] = 1
    with pytest.raises(RuntimeError, match="written to after their end"):
        cupy.get_default_memory_pool().free_all_blocks()
