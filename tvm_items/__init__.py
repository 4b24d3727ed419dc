"""What the test items `tvm` and `tvm_tune` are made of: import, code generation, and the tuner."""
