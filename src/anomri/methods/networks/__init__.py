"""The networks of the methods: the U-Net, one that knows the time step, those of a GAN."""
