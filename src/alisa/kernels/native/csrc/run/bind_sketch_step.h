// The part of the module that has the steps of a sketch.
#pragma once

#include <nanobind/nanobind.h>

void bind_sketch_step(nanobind::module_& m);
