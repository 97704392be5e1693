"""The guest's service (placeholder)."""
import signal
signal.pause()
