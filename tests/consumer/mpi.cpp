#include <diffattn/distributed/data_parallel.hpp>
#include <diffattn/distributed/mpi.hpp>
#include <diffattn/layers/linear.hpp>

// Alone or under mpirun.
int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  bool good = false;
  {
    diffattn::MpiCommunicator communicator(MPI_COMM_WORLD);
    diffattn::Linear<float> layer(3, 2);
    layer.weight.setConstant(1);
    diffattn::sum_gradients(communicator, layer);
    good = (layer.weight.array() == static_cast<float>(communicator.size())).all();
  }
  MPI_Finalize();
  return good ? 0 : 1;
}
