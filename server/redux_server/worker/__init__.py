"""The worker process: claims tasks and makes their images."""
