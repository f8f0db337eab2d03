# A room is one folder of src/ and one static library that links only the rooms it may include.

# Executables share the precompiled header of the libraries, so they are compiled alike.
set(CMAKE_CXX_COMPILE_OPTIONS_PIE -fPIC)

add_library(oryx_options INTERFACE)
target_compile_options(oryx_options INTERFACE
  -Wall -Wextra $<$<BOOL:${ORYX_WARNINGS_AS_ERRORS}>:-Werror> -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Wno-unknown-pragmas -fopenmp)
target_include_directories(oryx_options INTERFACE ${CMAKE_SOURCE_DIR}/src)
target_link_libraries(oryx_options INTERFACE fmt::fmt)
if(ORYX_SANITIZE)
  target_compile_options(oryx_options INTERFACE -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  target_link_options(oryx_options INTERFACE -fsanitize=address,undefined)
endif()

# One precompiled header for everything that sees tensors: ATen costs five seconds a file without it.
add_library(oryx_pch OBJECT ${CMAKE_SOURCE_DIR}/cmake/pch.cc)
target_link_libraries(oryx_pch PRIVATE oryx_options oryx::torch)
target_precompile_headers(oryx_pch PRIVATE <ATen/ATen.h> <string> <vector> <fmt/format.h>)

# oryx_room(NAME SOURCES… [ROOMS…] [LIBRARIES…] [TENSORS])
function(oryx_room name)
  cmake_parse_arguments(ROOM "TENSORS" "" "SOURCES;ROOMS;LIBRARIES" ${ARGN})
  add_library(oryx_${name} STATIC ${ROOM_SOURCES})
  target_link_libraries(oryx_${name} PUBLIC oryx_options ${ROOM_LIBRARIES})
  foreach(room ${ROOM_ROOMS})
    target_link_libraries(oryx_${name} PUBLIC oryx_${room})
  endforeach()
  if(ROOM_TENSORS)
    target_link_libraries(oryx_${name} PUBLIC oryx::torch)
    target_precompile_headers(oryx_${name} REUSE_FROM oryx_pch)
  endif()
endfunction()

# oryx_cpu_kernels(ROOM FILES…): each file is compiled once for AVX2 and once for AVX-512 and picked at
# run time (operators/cpu/isa.h).
function(oryx_cpu_kernels room)
  foreach(isa avx2 avx512)
    # Called once per operator: its folder tells the libraries apart.
    get_filename_component(folder ${CMAKE_CURRENT_SOURCE_DIR} NAME)
    set(library oryx_${room}_${folder}_${isa})
    add_library(${library} OBJECT ${ARGN})
    target_link_libraries(${library} PRIVATE oryx_options oryx::torch)
    string(TOUPPER ${isa} capability)
    target_compile_definitions(${library} PRIVATE
      ORYX_CPU_ISA=${isa} CPU_CAPABILITY=${capability} CPU_CAPABILITY_${capability})
    target_compile_options(${library} PRIVATE -O3 -mavx2 -mfma -mf16c
      -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wno-ignored-qualifiers -Wno-psabi
      -Wno-array-bounds)  # GCC 13 misreads the partial loads of ATen's vectors
    if(isa STREQUAL avx512)
      target_compile_options(${library} PRIVATE -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
    endif()
    target_sources(oryx_${room} PRIVATE $<TARGET_OBJECTS:${library}>)
  endforeach()
endfunction()

# oryx_test(NAME SOURCES… ROOMS… [LIBRARIES…] [TENSORS]): one GoogleTest binary, one CTest entry.
function(oryx_test name)
  if(NOT ORYX_TESTS)
    return()
  endif()
  cmake_parse_arguments(TEST "TENSORS" "" "SOURCES;ROOMS;LIBRARIES" ${ARGN})
  add_executable(${name} ${TEST_SOURCES})
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR} ${RAPIDCHECK_INCLUDE})
  target_link_libraries(${name} PRIVATE GTest::gtest_main GTest::gtest ${RAPIDCHECK_LIBRARY} ${TEST_LIBRARIES})
  foreach(room ${TEST_ROOMS})
    target_link_libraries(${name} PRIVATE oryx_${room})
  endforeach()
  if(TEST_TENSORS)
    target_precompile_headers(${name} REUSE_FROM oryx_pch)
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT 900)
endfunction()

function(oryx_benchmark name)
  if(NOT ORYX_BENCHMARKS)
    return()
  endif()
  cmake_parse_arguments(BENCH "" "" "SOURCES;ROOMS" ${ARGN})
  add_executable(${name} ${BENCH_SOURCES})
  target_link_libraries(${name} PRIVATE benchmark::benchmark benchmark::benchmark_main)
  foreach(room ${BENCH_ROOMS})
    target_link_libraries(${name} PRIVATE oryx_${room})
  endforeach()
endfunction()
