"""How ranks are started and watched: processes, signals, devices, and the outer launchers. Never imports
torch.
"""
