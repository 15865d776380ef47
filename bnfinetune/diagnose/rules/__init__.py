"""The rules themselves, by theme; `bnfinetune.diagnose.registry` lists and runs them."""
