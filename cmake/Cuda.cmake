# CUDA kernels: files without LibTorch in their operators' folders, compiled by nvcc through plain commands (CMake's
# own CUDA language would ask for a whole toolkit) and, for the tests, by the host compiler for the emulator of
# src/operators/device/emulator.h.
set(ORYX_CUDA_ARCHITECTURES "80;90a" CACHE STRING "sm_ numbers that kernels are compiled for")

get_filename_component(site_packages ${ORYX_TORCH_DIR} DIRECTORY)
# The runtime's headers are those of the torch wheel; crt/ comes with a compiler.
find_path(ORYX_CUDA_CRT crt/host_defines.h HINTS ${site_packages}/nvidia/cu13/include /usr/local/cuda/include REQUIRED)
set(ORYX_CUDA_INCLUDE ${site_packages}/nvidia/cu13/include ${ORYX_CUDA_CRT})
if(ORYX_CUDA AND EXISTS ${ORYX_TORCH_DIR}/lib/libtorch_cuda.so)
  list(APPEND ORYX_C10D_OPTIONS -DUSE_C10D_NCCL)
  foreach(directory ${site_packages}/nvidia/nccl/include ${ORYX_CUDA_INCLUDE})
    list(APPEND ORYX_C10D_OPTIONS -isystem ${directory})
  endforeach()
endif()
if(CCACHE)
  set(ORYX_NVCC_LAUNCHER ${CCACHE})
endif()
if(ORYX_CUDA)
  file(GLOB ORYX_CUDART ${site_packages}/nvidia/cu13/lib/libcudart.so.13)
  find_program(ORYX_NVCC nvcc HINTS ${site_packages}/nvidia/cu13/bin /usr/local/cuda/bin)
  if(NOT ORYX_NVCC)
    message(FATAL_ERROR "no nvcc: run scripts/setup, name one with -DORYX_NVCC=, or build with -DORYX_CUDA=OFF")
  endif()
  execute_process(COMMAND ${ORYX_NVCC} --version OUTPUT_VARIABLE nvcc_version)
  if(NOT nvcc_version MATCHES "release 13\\.")
    message(FATAL_ERROR "expected nvcc of CUDA 13, as the torch wheel; ${ORYX_NVCC} says:\n${nvcc_version}")
  endif()
  set(gencode)
  foreach(architecture ${ORYX_CUDA_ARCHITECTURES})
    list(APPEND gencode -gencode=arch=compute_${architecture},code=sm_${architecture})
  endforeach()
  # PTX of the oldest architecture serves GPUs that are newer than this list.
  list(GET ORYX_CUDA_ARCHITECTURES 0 oldest)
  list(APPEND gencode -gencode=arch=compute_${oldest},code=compute_${oldest})
  set(ORYX_NVCC_FLAGS -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -Xcompiler=-fPIC,-Wall,-Wextra,-Wno-unused-parameter
      -Xptxas=-v,-warn-spills -diag-suppress=177 ${gencode} -isystem ${site_packages}/nvidia/cu13/include)
endif()

# oryx_cuda_libraries(ROOM RUNTIME EMULATED_RUNTIME EMULATOR): beside the room's library, oryx_<room>_cuda with the
# kernels as nvcc compiles them and oryx_<room>_emulated, objects with the same symbols for the emulator. Whoever
# links the room gets the first; a test that adds the objects gets the second. Without CUDA there is only the second.
function(oryx_cuda_libraries room runtime emulated_runtime emulator)
  add_library(oryx_${room}_emulated OBJECT ${emulated_runtime} ${emulator})
  target_compile_definitions(oryx_${room}_emulated PRIVATE ORYX_EMULATED)
  target_link_libraries(oryx_${room}_emulated PRIVATE oryx_options oryx::torch)
  target_include_directories(oryx_${room}_emulated SYSTEM PRIVATE ${ORYX_CUDA_INCLUDE})
  target_compile_options(oryx_${room}_emulated PRIVATE -O2 -Wno-unused-function -Wno-sign-compare)
  if(ORYX_CUDA)
    add_library(oryx_${room}_cuda STATIC ${runtime})
    target_link_libraries(oryx_${room}_cuda PRIVATE oryx_options)
    target_link_libraries(oryx_${room}_cuda PUBLIC oryx_base oryx::torch ${ORYX_CUDART})
    target_include_directories(oryx_${room}_cuda SYSTEM PRIVATE ${ORYX_CUDA_INCLUDE})
  else()
    add_library(oryx_${room}_cuda STATIC $<TARGET_OBJECTS:oryx_${room}_emulated>)
  endif()
  target_link_libraries(oryx_${room} PUBLIC oryx_${room}_cuda)
endfunction()

# oryx_cuda_kernels(ROOM FILES…): adds the kernels of an operator to both libraries.
function(oryx_cuda_kernels room)
  foreach(file ${ARGN})
    set_property(GLOBAL APPEND PROPERTY oryx_${room}_kernels ${CMAKE_CURRENT_SOURCE_DIR}/${file})
  endforeach()
endfunction()

# Called in the folder of oryx_cuda_libraries() after every oryx_cuda_kernels().
function(oryx_finish_cuda_libraries room)
  get_property(kernels GLOBAL PROPERTY oryx_${room}_kernels)
  set_source_files_properties(${kernels} PROPERTIES LANGUAGE CXX)
  target_sources(oryx_${room}_emulated PRIVATE ${kernels})
  if(NOT ORYX_CUDA)
    return()
  endif()
  foreach(source ${kernels})
    cmake_path(GET source STEM name)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.cu.o)
    # Registers, shared memory and spills of each kernel go to the .log beside the object.
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_SOURCE_DIR}/cmake/nvcc-with-log ${object}.log ${ORYX_NVCC_LAUNCHER} ${ORYX_NVCC} ${ORYX_NVCC_FLAGS}
              -I${CMAKE_SOURCE_DIR}/src -MD -MF ${object}.d -c ${source} -o ${object}
      DEPENDS ${source} ${CMAKE_SOURCE_DIR}/cmake/nvcc-with-log
      DEPFILE ${object}.d
      COMMENT "Building CUDA object ${name}.cu.o"
      VERBATIM)
    set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
    target_sources(oryx_${room}_cuda PRIVATE ${object})
  endforeach()
endfunction()

# oryx_kernel_test(NAME SOURCES…): a test of kernels as two programs. NAME runs them in the emulator, in CTest on any
# machine; NAME_gpu runs the same cases on a GPU (scripts/test-gpu).
function(oryx_kernel_test name)
  if(NOT ORYX_TESTS)
    return()
  endif()
  oryx_test(${name} TENSORS SOURCES ${ARGN} $<TARGET_OBJECTS:oryx_operators_emulated> ROOMS operators)
  target_compile_definitions(${name} PRIVATE ORYX_EMULATED)
  target_include_directories(${name} SYSTEM PRIVATE ${ORYX_CUDA_INCLUDE})
  if(ORYX_CUDA)
    add_executable(${name}_gpu EXCLUDE_FROM_ALL ${ARGN})
    target_include_directories(${name}_gpu PRIVATE ${CMAKE_SOURCE_DIR} ${RAPIDCHECK_INCLUDE})
    target_link_libraries(${name}_gpu PRIVATE GTest::gtest_main GTest::gtest ${RAPIDCHECK_LIBRARY} oryx_operators)
    target_precompile_headers(${name}_gpu REUSE_FROM oryx_pch)
    set_property(GLOBAL APPEND PROPERTY oryx_gpu_tests ${name}_gpu)
  endif()
endfunction()
