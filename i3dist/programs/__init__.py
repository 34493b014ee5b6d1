"""What `i3dist COMMAND` starts; `main` lists the commands."""
