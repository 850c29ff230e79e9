// One step of a cell and its gradients from Python, past the dispatcher: functions of rnnkern._C.
#pragma once

#include <Python.h>

namespace rnnkern {

// Adds train_step and train_step_backward to the module; false with an exception set.
bool add_train_step(PyObject* module);

}  // namespace rnnkern
