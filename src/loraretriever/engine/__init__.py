"""Running compositions: from requests to generations."""
