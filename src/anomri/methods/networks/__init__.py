"""The networks that methods are made of: the U-Net of the paper, one that knows the time step, and those of a GAN."""
