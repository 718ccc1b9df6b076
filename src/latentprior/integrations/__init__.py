"""The prior in scikit-learn, PyOD, tables and ONNX."""
