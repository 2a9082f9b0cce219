"""Pictures in and out, and the safety checker. Imports no torch."""
