"""The images and docker-compose.yml on a real Docker Engine: built, brought up, disturbed, and taken down."""
