"""Finished networks for other programs: ONNX, torch.export, torchvision and timm folders, and the hub."""
