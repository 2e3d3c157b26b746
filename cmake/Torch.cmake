# Finds torch, decides whether the CUDA kernels are built, and sets MASKED_LOSS_HAS_CUDA.

# The Python module needs its own interpreter's torch; a build without it takes what Torch_DIR or CMAKE_PREFIX_PATH
# names, and asks an interpreter only where that is nothing.
if(NOT MASKED_LOSS_PYTHON)
  find_path(Torch_DIR TorchConfig.cmake PATH_SUFFIXES share/cmake/Torch)
endif()
if(NOT Torch_DIR)
  if(NOT Python_EXECUTABLE)
    find_program(Python_EXECUTABLE NAMES python3 python)
  endif()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE _masked_loss_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  find_path(Torch_DIR TorchConfig.cmake PATHS ${_masked_loss_torch} PATH_SUFFIXES share/cmake/Torch NO_DEFAULT_PATH)
endif()
if(NOT Torch_DIR)
  message(FATAL_ERROR "masked_loss needs torch: name its place with CMAKE_PREFIX_PATH, or an interpreter that has it "
    "with Python_EXECUTABLE")
endif()
cmake_path(SET _masked_loss_torch NORMALIZE "${Torch_DIR}/../../..")

set(MASKED_LOSS_CUDA auto CACHE STRING "The CUDA kernels: on, off, or auto: where torch has CUDA and nvcc is found")
set_property(CACHE MASKED_LOSS_CUDA PROPERTY STRINGS auto on off)
# Asks nvcc where its toolkit is: the nvcc on the PATH may be a script, and torch's CMake looks beside it.
find_package(CUDAToolkit QUIET)
if(EXISTS "${_masked_loss_torch}/lib/libtorch_cuda.so")
  set(_masked_loss_torch_cuda ON)
endif()
set(MASKED_LOSS_HAS_CUDA OFF)
if(MASKED_LOSS_CUDA STREQUAL "auto")
  if(_masked_loss_torch_cuda AND CUDAToolkit_NVCC_EXECUTABLE)
    set(MASKED_LOSS_HAS_CUDA ON)
  endif()
elseif(MASKED_LOSS_CUDA)
  if(NOT _masked_loss_torch_cuda)
    message(FATAL_ERROR "MASKED_LOSS_CUDA is on, but the torch in ${_masked_loss_torch} is built without CUDA")
  elseif(NOT CUDAToolkit_NVCC_EXECUTABLE)
    message(FATAL_ERROR "MASKED_LOSS_CUDA is on, but nvcc is not found: put it on the PATH, or set CUDAToolkit_ROOT")
  endif()
  set(MASKED_LOSS_HAS_CUDA ON)
endif()

if(TARGET torch)  # of a project that has this one as a folder
elseif(MASKED_LOSS_HAS_CUDA)
  cmake_path(GET CUDAToolkit_BIN_DIR PARENT_PATH CUDA_TOOLKIT_ROOT_DIR)
  set(CMAKE_CUDA_COMPILER "${CUDAToolkit_BIN_DIR}/nvcc")
  if(NOT CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
    set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  endif()
  set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
  if(NOT TORCH_CUDA_ARCH_LIST AND NOT DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    set(TORCH_CUDA_ARCH_LIST "8.0;9.0;10.0+PTX")
    if(CUDAToolkit_VERSION VERSION_LESS 12.8)
      set(TORCH_CUDA_ARCH_LIST "8.0;9.0+PTX")
    endif()
  endif()
  enable_language(CUDA)
  if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 drops the standard that it does not know
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
  find_package(Torch REQUIRED)
elseif(_masked_loss_torch_cuda)
  # torch's own CMake files insist on the toolkit that it was built with, which the CPU's half of torch does without.
  include(${Torch_DIR}/TorchConfigVersion.cmake)
  set(Torch_VERSION ${PACKAGE_VERSION})
  set(TORCH_INSTALL_PREFIX ${_masked_loss_torch})
  add_library(torch INTERFACE IMPORTED GLOBAL)
  target_include_directories(torch SYSTEM INTERFACE
    ${_masked_loss_torch}/include ${_masked_loss_torch}/include/torch/csrc/api/include)
  target_link_libraries(torch INTERFACE ${_masked_loss_torch}/lib/libtorch_cpu.so ${_masked_loss_torch}/lib/libc10.so)
else()
  find_package(Torch REQUIRED)
endif()

# The architectures that kernels are built for, as the package tells them.
set(MASKED_LOSS_CUDA_ARCHITECTURES "")
if(MASKED_LOSS_HAS_CUDA)
  set(MASKED_LOSS_CUDA_ARCHITECTURES "${TORCH_CUDA_ARCH_LIST}")
  if(NOT MASKED_LOSS_CUDA_ARCHITECTURES)
    set(MASKED_LOSS_CUDA_ARCHITECTURES "$ENV{TORCH_CUDA_ARCH_LIST}")
  endif()
  message(STATUS "masked_loss: CUDA kernels for ${MASKED_LOSS_CUDA_ARCHITECTURES}")
else()
  message(STATUS "masked_loss: no CUDA kernels")
endif()
