"""rl4seg: adapt a 2D segmentation network to unlabelled images by PPO against a learned reward."""
