"""Models for other programs: ONNX graphs with a small router, torch.export programs, and folders for Hugging Face.

May use every room below it: `config`, `runtime`, `model`, `data`, `training`, `routing` and `evaluation`.
Read first: `export.py`. It writes `graphs`, which `onnx_router` runs, or `adaptive`, `hugging_face` and a `card`.
"""
