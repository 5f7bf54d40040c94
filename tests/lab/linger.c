/* crun waits for its container's word and for its end at once, and may see the end first and drop the word.  The helper of its
   tests sends the word and ends: staying for a second after it decides that race.  Linked with --wrap=sendto.  */
#include <sys/socket.h>
#include <unistd.h>

ssize_t __real_sendto (int fd, const void *data, size_t length, int flags, const struct sockaddr *to, socklen_t size);

ssize_t
__wrap_sendto (int fd, const void *data, size_t length, int flags, const struct sockaddr *to, socklen_t size)
{
  ssize_t sent = __real_sendto (fd, data, length, flags, to, size);
  sleep (1);
  return sent;
}
