"""How init, learning rate, weight decay and forward factor of a matrix follow from its role and shape."""
