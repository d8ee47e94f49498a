// The part of the Python module that reads prompts; see module.cpp.
#pragma once

#include <nanobind/nanobind.h>

#include "workspace.h"

void bind_prefill(nanobind::class_<alisa::Workspace>& workspace);
