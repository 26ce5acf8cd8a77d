# What a CUDA compiler can compile for.
set(OLDEST_NVCC 12.1)  # the first with atomics of whole vectors (sm_90)
set(BLACKWELL_NVCC 12.8)  # the first that knows 100 and 120

# Sets `to` to those of the asked architectures that the compiler knows; empty where it is too old for all. The last one left goes
# with PTX, for what is to come.
function(known_architectures to asked version)
  if(version VERSION_LESS OLDEST_NVCC)
    set(${to} "" PARENT_SCOPE)
    return()
  endif()
  set(known ${asked})
  if(version VERSION_LESS BLACKWELL_NVCC)
    list(FILTER known EXCLUDE REGEX "^1[0-9][0-9]")
  endif()
  if(NOT known STREQUAL asked)
    if(known)
      list(POP_BACK known last)
      string(REGEX REPLACE "-real$" "" last "${last}")
      list(APPEND known ${last})
    endif()
    message(STATUS "detrcli_ops: nvcc ${version} does not know all of ${asked}, but ${known}")
  endif()
  set(${to} "${known}" PARENT_SCOPE)
endfunction()
