"""rl4seg3d: spatio-temporal echocardiographic segmentation, adapted without labels of the target."""
