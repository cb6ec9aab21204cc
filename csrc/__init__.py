"""Makes `from csrc import build` mean this folder, whatever else is installed."""
