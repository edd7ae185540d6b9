"""The photographs of the demo; README.md has their licences."""
