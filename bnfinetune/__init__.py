"""bnfinetune: fine-tuning of timm backbones with BatchNorm handled right."""
