// The part of the Python module that knows the layers of a model; see module.cpp.
#pragma once

#include <nanobind/nanobind.h>

void bind_model(nanobind::module_& m);
