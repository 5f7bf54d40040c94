/* A process whose first thread ends at once while another one goes on. */
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *go_on(void *unused)
{
	for (;;)
		pause();
	return unused;
}

int main(void)
{
	pthread_t thread;

	if (pthread_create(&thread, 0, go_on, 0))
		return 1;
	syscall(SYS_exit, 0);
}
