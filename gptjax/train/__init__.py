"""The one loop, and what differs between its uses."""
