"""The face to the world: HTTP, keys, the asyncio driver, replica processes."""
