# Adds the torch of a Python interpreter to CMAKE_PREFIX_PATH. The Python module needs its own interpreter's torch; a
# build without it takes what CMAKE_PREFIX_PATH names, and asks an interpreter only where that is nothing.
if(NOT MASKED_LOSS_PYTHON)
  find_package(Torch QUIET)
endif()
if(NOT Torch_FOUND)
  if(NOT Python_EXECUTABLE)
    find_program(Python_EXECUTABLE NAMES python3 python)
  endif()
  if(Python_EXECUTABLE)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE _masked_loss_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(_masked_loss_torch)
      list(PREPEND CMAKE_PREFIX_PATH ${_masked_loss_torch})
    endif()
  endif()
endif()
