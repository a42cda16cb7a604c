"""Provide what methods are made of: the contract, data, gradients, rounds."""
