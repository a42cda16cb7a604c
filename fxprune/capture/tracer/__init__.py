"""Record what user code does: proxies, module calls, numbers, state."""
