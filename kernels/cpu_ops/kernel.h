// How kernels are called. A kernel gets a struct of its arguments, and every thread of a team calls it: it deals its work
// out by orphaned `omp for`, at the end of which the threads wait for each other. Whether the team was made for one kernel
// or for all of a step (kernel.cpp) makes no difference to it, nor does the number of threads to the result.
#pragma once

#include "vec.h"

#define SHOAL_KERNEL(name, Arguments) extern "C" __attribute__((visibility("default"))) void shoal_##name(const Arguments& a)
