"""Both towers as ONNX graphs for servers, checked against torch, and in int8 where that is asked for."""
