# LibTorch is the pinned torch wheel of the project's virtual environment. Its libraries are linked by
# path: Torch's own CMake package insists on a CUDA toolkit even where nothing is compiled with it.
set(ORYX_TORCH_VERSION 2.11.0)
set(ORYX_TORCH_DIR "" CACHE PATH "Folder of the torch Python package (default: the one in .venv)")

if(NOT ORYX_TORCH_DIR)
  file(GLOB candidates ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
  list(LENGTH candidates found)
  if(NOT found EQUAL 1)
    message(FATAL_ERROR "no torch in ${CMAKE_SOURCE_DIR}/.venv: run scripts/setup, or set ORYX_TORCH_DIR")
  endif()
  set(ORYX_TORCH_DIR ${candidates})
endif()

file(READ ${ORYX_TORCH_DIR}/version.py version_text)
if(NOT version_text MATCHES "__version__ = '${ORYX_TORCH_VERSION}")
  message(FATAL_ERROR "expected torch ${ORYX_TORCH_VERSION} in ${ORYX_TORCH_DIR}, its version.py says otherwise")
endif()

add_library(oryx_torch INTERFACE)
add_library(oryx::torch ALIAS oryx_torch)
target_include_directories(oryx_torch SYSTEM INTERFACE
  ${ORYX_TORCH_DIR}/include ${ORYX_TORCH_DIR}/include/torch/csrc/api/include)
# libgomp is the wheel's own: two OpenMP runtimes in one process would each start their threads.
file(GLOB torch_gomp ${ORYX_TORCH_DIR}/lib/libgomp*.so*)
target_link_libraries(oryx_torch INTERFACE
  ${ORYX_TORCH_DIR}/lib/libtorch_cpu.so ${ORYX_TORCH_DIR}/lib/libc10.so ${torch_gomp})
if(ORYX_CUDA AND EXISTS ${ORYX_TORCH_DIR}/lib/libtorch_cuda.so)
  # The CUDA libraries register their kernels when loaded; nothing refers to them by symbol.
  target_link_libraries(oryx_torch INTERFACE -Wl,--no-as-needed
    ${ORYX_TORCH_DIR}/lib/libtorch_cuda.so ${ORYX_TORCH_DIR}/lib/libc10_cuda.so -Wl,--as-needed)
endif()
target_link_options(oryx_torch INTERFACE -Wl,-rpath,${ORYX_TORCH_DIR}/lib)

# For the file that trains over several processes. The wheel has c10d, with Gloo and NCCL inside, but not Gloo's
# headers, which c10d's own include: the distribution's serve, its library is not linked.
find_path(GLOO_INCLUDE gloo/context.h REQUIRED)
set(ORYX_C10D_OPTIONS -DUSE_C10D_GLOO)
