"""graft: distil an ensemble of teachers into one 3D U-Net."""
