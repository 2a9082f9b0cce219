"""GPU operators of FLUX Redux Server (torch and triton only)."""
