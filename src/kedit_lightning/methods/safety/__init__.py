"""Methods that change what a model says where it should not."""
