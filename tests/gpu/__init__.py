"""What needs a GPU to be proven: `make gpu` runs it in under ten minutes. The same logic runs on the CPU with tiny sizes."""
